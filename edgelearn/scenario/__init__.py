"""What is learned, who sees which part of it, and when.

`spec` holds the frozen dataclasses, `load` turns TOML into them, `datasets` reads samples,
`partition` deals them out (`dealing`: a whole data set), `stream` orders them in time, `given` as
the data set says, `samples` gathers batches, `world` puts it all together. To add a data set, write
a function `DataSpec -> Dataset` and name it in the entry-point group `edgelearn.datasets`,
or give it as `file.py:function`.
"""
