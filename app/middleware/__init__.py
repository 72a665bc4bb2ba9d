"""What every request passes: access, body limits, security headers, request log and metrics."""
