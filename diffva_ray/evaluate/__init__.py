"""From a finished run to tables, figures and a page."""
