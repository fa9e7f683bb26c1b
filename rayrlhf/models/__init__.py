"""Language models and reward models: loading, checking, saving."""
