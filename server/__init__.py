"""The control plane: HTTP routes that switch expert masks and traces of a running server."""
