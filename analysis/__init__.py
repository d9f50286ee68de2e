"""Instruments: what registers and merging do to a Vision Transformer. They import the core, never the reverse.

    from analysis import norms

    result = norms.measure(model, images)          # model: a MergingViT or timm ViT; images: (B,3,H,W) or batches
    norms.draw(result).savefig("layers.png")       # or draw([result, another]); more figures are draw_histogram, ...
    norms.summarise(result)["outliers"]            # numbers

One module per instrument holds its mathematics, its figures and its command, in this order:
`measure(model, images, *, options, label="model")` returns a dataclass with documented fields and the `label`;
`summarise(result)` gives plain numbers, `draw(results)` a matplotlib figure of one result or several;
`add_parser(subparsers)` adds the command of run/analyze.py and `run(args, main_argv)` is it: it reads flags, calls the
others and writes files. Importing an instrument needs the core and matplotlib only. What a command needs of the program
(flags, data sets, loading of weights) is in `command`, which is imported inside `add_parser` and `run`.
A new instrument is a new module and a line in `commands`.

Models are compared on the same images. Where outliers matter, `measure` takes the `yardstick` of the first model's
result, so that all are judged by one cut. Numbers have intervals over images (`intervals`), none below five images;
figures of several models have one colour scale, and say n.

Shared: `walk` (a model block by block), `outliers` (the yardstick), `intervals`, `charts` (the style of all figures),
`inputs`. docs/analysis.ipynb shows the lot.
"""
