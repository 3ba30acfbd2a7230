"""JSON Schemas of the platform's payloads: read as shapes, which become checks and are compared."""
