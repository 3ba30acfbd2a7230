"""How a request reaches a sidecar: oneshot and stream."""
