"""What a run looks like to a reader: figures, one page, tables.

`results` derives numbers that the record does not hold ready; `figures` draws them, in the look of
`theme`; `page` writes one self-contained HTML file; `tables` prints a run, `comparison` compares
strategies over seeds; `formats` writes numbers. Everything here only reads a `RunRecord`: nothing
is measured or guessed.

To add a figure, write a function `draw_*(record) -> Figure` in `figures`, add it to `draw_all`, and
give it a caption in `page`. Colours are roles of `theme`, so that they follow light and dark. Only
`figures` and `theme` need matplotlib (the extra `report`), and import it when they are called.
"""
