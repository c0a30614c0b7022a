"""megatron_ltd: distributed pretraining of language models with random layerwise token dropping."""

__version__ = "0.1.0"
