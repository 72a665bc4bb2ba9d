"""Image bytes to class probabilities: decoding, batching and the live models."""
