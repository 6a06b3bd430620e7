"use strict";
(() => {
  const films = document.getElementById("films");
  if (!films) return;
  const wanted = document.getElementById("class");
  const order = document.getElementById("order");
  const count = document.getElementById("count");
  const all = [...films.children];

  function arrange() {
    const key = order.value.replace("-", "");
    const sign = order.value.startsWith("-") ? -1 : 1;
    all.sort((a, b) => sign * (Number(a.dataset[key]) - Number(b.dataset[key])));
    let shown = 0;
    for (const film of all) {
      film.hidden = wanted.value !== "" && film.dataset.label !== wanted.value;
      shown += film.hidden ? 0 : 1;
    }
    films.append(...all);
    count.textContent = shown + (shown === 1 ? " film" : " films");
  }

  wanted.addEventListener("change", arrange);
  order.addEventListener("change", arrange);
  document.getElementById("tools").hidden = false;
  arrange();
})();
