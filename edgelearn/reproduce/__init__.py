"""Published and reference numbers, run again: tables of settings, and the page that compares them.

`table` says what a table and a row are; `results` keeps what was measured, so that an interrupted
reproduction goes on; `runner` measures what is missing; `page` writes one section of
`docs/reproduction.md` for each table. `centralised` learns one stream on a single device, which is
what most papers do. The other modules are tables.

To add a table, write a module with a `Table` called `TABLE`, and name it under
`edgelearn.reproductions` in `pyproject.toml`; `edgelearn reproduce file.py:TABLE` needs neither. A
row calls a function of keyword arguments and `seed` that returns numbers by name.
"""
