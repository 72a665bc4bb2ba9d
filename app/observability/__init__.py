"""Observability of the service: metrics for Prometheus, and traces for OpenTelemetry."""
