"""What is bound into a cage and attacks it from inside; imports only the standard library and itself."""
