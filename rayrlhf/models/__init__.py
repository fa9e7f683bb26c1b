"""Language models and reward models: loading, saving, packed rows, log-probs, LoRA, and ranks that share the work.

`forward.Forward` is the one way through a model.
"""
