"""`edgelearn compress`: a network through a pipeline, measured after each stage.

`subject` finds the network and its samples, `rows` measures, `run` goes through the stages and
writes files, `options` and `command` are the command line. From Python:

    from edgelearn.compress.tune import samples_of
    from edgelearn.compressing.run import compress

    report = compress(
        module,
        train=samples_of(x, y),
        test=samples_of(x_test, y_test),
        pipeline='train(5) | prune_channels(0.5) | distill | quantize(runtime="onnxruntime")',
        out=Path("small"),
    )
    for row in report.rows: ...   # parameters, MACs, bytes, accuracy, latency

The stages themselves are in `edgelearn.compress.pipeline`; a new one is declared in
`edgelearn.scenario.stages` and run there.
"""
