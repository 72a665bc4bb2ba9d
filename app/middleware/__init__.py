"""Every request passes these layers: access, proxy, body limits, security headers, request log, metrics."""
