"""What the service reports about itself: metrics for Prometheus, and traces for OpenTelemetry."""
