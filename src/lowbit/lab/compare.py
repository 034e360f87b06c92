"""Several methods on the same work: the same data order, seeds, epochs and initial weights.

`compare` trains every method with every seed (each in a run folder of its own, see `runs`), measures one training
step of each against float32, and writes `results.json` and `report.html` into its folder.

`results.json`, also what `report_html.write(results, path)` takes: plain JSON values only. `null` stands for what was
not measured or is not a finite number. Fields of one method that failed may all be `null` or empty.

    schema        "lowbit-compare-1"
    title         "lenet5 on digits"
    created       "2025-11-21T10:30:00Z"
    command       the command line
    task          "classification", "lm" or "translation"
    metric        {"name": "accuracy", "unit": "%", "better": "higher"}, values 0 to 100
                  or {"name": "perplexity", "unit": "", "better": "lower"}
    data          {"source", "fingerprint", "train": examples, "test": examples, "input_shape", "classes", "limit"}
    model         {"name", "options": {}, "parameters": count}
    settings      what all methods share: {"epochs", "batch_size", "steps_per_epoch", "schedule", ...}
    seeds         [0, 1]
    baseline      name of the method that ratios refer to ("fp32"), or null if it was not among them
    environment   {"lowbit", "torch", "python", "platform", "cpu", "threads", "device", "revision"}
    methods       a list in the order asked for, each:
      key         unique in this file: "luq", or "luq samples=2" where options were given
      name        "luq"
      options     {"samples": 2}
      title, year, arxiv, area, summary    from the method's card
      status      "ok", "failed" (an error) or "diverged" (loss not finite): the worst of its runs
      reason      one line; "" when ok
      metric      {"mean", "spread", "values": [one a seed, null if it failed]} or null. The final epoch's value on the
                  test split; spread is the sample standard deviation over seeds, null for a single one
      bits        {"W", "A", "E", "G", "U"}: mean stored bits over layers, or null
      bytes       stored weights (codes and scales) in bytes, as lowbit.save writes them, or null
      step        {"ms": median, "ratio": median to float32's in the same rounds, "rounds": n} or null
      training    what this run used: {"optimizer", "lr", "momentum", "weight_decay", "criterion", ...}
      roles       {"W": "Int(bits=2, ...)", ...}: format of each quantized role
      runs        one a seed: {"seed", "folder", "status", "reason", "metric", "loss", "seconds", "curve", "steps"}
        curve     one an epoch: {"epoch": 1 ..., "step", "train_loss", "train_metric", "test_loss", "test_metric"}
                  metrics as in `metric` (percent or perplexity)
        steps     a few hundred at most: {"step", "loss", "lr"}: loss of the training batches
      layers      of the first seed's final weights on one batch, one for each layer and role: {"layer", "kind", "role",
                  "format", "bits", "scale", "sqnr", "exact", "clipped", "zero", "note"}; role W, A, E, G, U, another
                  operand such as "grad_w_right", or "-" for a layer left in float; sqnr in dB, null when not measured
                  or when `exact` is true (nothing lost); clipped and zero are fractions
      histograms  of W, A and E of at most 12 layers on that batch, one for each: {"layer", "role", "format", "count",
                  "edges": 65 bin edges, "counts": 64, "levels": grid levels in real units (at most 65, ascending; fewer
                  than the format has where it has more), "clip": [low, high] of the grid in real units, "blocks":
                  number of scales, "magnitudes": {"edges": 65 values of log2|x|, "counts": 64, "zeros": count}}.
                  Real units throughout. With several blocks `levels` and `clip` belong to the block of median scale.
                  `levels` is [] and `clip` null where the tensor is transformed before it meets its grid. A method
                  that leaves a role in float (fp32) has the histogram with "format": "float32", no levels, no clip.
    ranking       keys of methods, best metric first, failed ones last
"""

from __future__ import annotations
