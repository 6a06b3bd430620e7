"""The rule of ``--accept``: a condition over columns of the records, such as ``ssim > 0.8 and label == "COVID"``.

The rule is parsed by Python's own parser, but only the nodes named here are evaluated: no call, attribute or index.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from diffva_ray.data.dataset import UnusableData

MAX_LENGTH = 1000  # characters; Python's parser recurses
COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
}
ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: pc.add,
    ast.Sub: pc.subtract,
    ast.Mult: pc.multiply,
}
JOIN: dict[type[ast.boolop], Callable[[Any, Any], Any]] = {ast.And: pc.and_kleene, ast.Or: pc.or_kleene}


class Rule:
    """A rule over the columns of ``schema``; the empty text accepts every record.

    A value that is missing makes a comparison unknown, and a record is accepted only where the rule is known to hold.
    Raises UnusableData for a rule that cannot be evaluated."""

    def __init__(self, text: str, schema: pa.Schema) -> None:
        self.text = " ".join(text.split())
        self._tree: ast.expr | None = None
        self.columns: list[str] = []  # that the rule reads
        if not self.text:
            return
        if len(self.text) > MAX_LENGTH:
            raise self._wrong(f"it has {len(self.text)} characters; at most {MAX_LENGTH} are read")
        try:
            self._tree = ast.parse(self.text, mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            raise self._wrong('write it as in "ssim > 0.8 and judge_counterfactual > 0.5"') from None
        self.columns = sorted({node.id for node in ast.walk(self._tree) if isinstance(node, ast.Name)})
        for name in self.columns:
            if name not in schema.names:
                near = get_close_matches(name, schema.names, 3, 0.5) or ["ssim"]
                raise self._wrong(f"the records have no column {name}; did you mean {' or '.join(near)}?")
        self.accepts(schema.empty_table())  # types that do not fit are found before the work
        self.reasons(schema.empty_table())

    def accepts(self, table: pa.Table) -> NDArray[np.bool_]:
        """Whether each record of ``table`` is accepted, bool [records]."""
        if self._tree is None:
            return np.ones(len(table), bool)
        return self._holds(self._tree, table)

    def _holds(self, tree: ast.expr, table: pa.Table) -> NDArray[np.bool_]:
        try:
            value = self._value(tree, table)
        except (pa.ArrowException, RecursionError) as error:
            reason = "numbers and text are mixed" if isinstance(error, pa.ArrowException) else "it is too deep"
            raise self._wrong(reason) from None
        if not (isinstance(value, pa.ChunkedArray) and pa.types.is_boolean(value.type)):
            raise self._wrong("it is not a condition on a column; compare one, as in ssim > 0.8")
        accepted: NDArray[np.bool_] = pc.fill_null(value, False).to_numpy()
        return accepted

    def reasons(self, table: pa.Table) -> list[str]:
        """For each record the conditions of the rule that are not known to hold, joined by ``; ``; "" for none."""
        if self._tree is None:
            return [""] * len(table)
        joined = isinstance(self._tree, ast.BoolOp) and isinstance(self._tree.op, ast.And)
        conditions = self._tree.values if joined else [self._tree]  # type: ignore[attr-defined]
        failed = [~self._holds(condition, table) for condition in conditions]
        texts = [f"not {_text(condition)}" for condition in conditions]
        return ["; ".join(text for text, at in zip(texts, row) if at) for row in zip(*failed)]

    def _value(self, node: ast.expr, table: pa.Table) -> Any:
        """The value of a node: a column, or a scalar."""
        if isinstance(node, ast.Name):
            column = table[node.id]
            return column.cast(pa.float64()) if not pa.types.is_string(column.type) else column
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return pa.scalar(node.value)
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
            return pa.scalar(float(node.value))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return pc.negate(self._value(node.operand, table))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return pc.invert(self._value(node.operand, table))
        if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
            return ARITHMETIC[type(node.op)](self._value(node.left, table), self._value(node.right, table))
        if isinstance(node, ast.BoolOp):
            value = self._value(node.values[0], table)
            for part in node.values[1:]:
                value = JOIN[type(node.op)](value, self._value(part, table))
            return value
        if isinstance(node, ast.Compare):
            return self._comparison(node, table)
        raise self._wrong(
            f"{ast.unparse(node)[:60]} is not allowed; use columns, numbers, text, comparisons, and, or, not"
        )

    def _comparison(self, node: ast.Compare, table: pa.Table) -> Any:
        """``a < b < c`` as ``a < b and b < c``; ``in`` compares with each value of a list."""
        left, result = self._value(node.left, table), None
        for operator, right_node in zip(node.ops, node.comparators, strict=True):
            if isinstance(operator, ast.In | ast.NotIn) and isinstance(right_node, ast.List | ast.Tuple):
                held: Any = pa.scalar(False)
                for item in right_node.elts:
                    held = pc.or_kleene(held, pc.equal(left, self._value(item, table)))
                part, right = (held if isinstance(operator, ast.In) else pc.invert(held)), left
            elif type(operator) in COMPARE:
                right = self._value(right_node, table)
                part = COMPARE[type(operator)](left, right)
            else:
                raise self._wrong("use <, <=, >, >=, ==, !=, or in with a list")
            result, left = part if result is None else pc.and_kleene(result, part), right
        return result

    def _wrong(self, reason: str) -> UnusableData:
        return UnusableData(f'--accept "{self.text[:80]}": {reason}')


def _text(condition: ast.expr) -> str:
    text = ast.unparse(condition)
    return f"({text})" if isinstance(condition, ast.BoolOp) else text
