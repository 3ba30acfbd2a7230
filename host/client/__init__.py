"""The published client (``isolator_client``) with this project's types and errors."""
