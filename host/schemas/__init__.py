"""JSON Schemas of the platform's payloads: read as shapes, which become models and are compared."""
