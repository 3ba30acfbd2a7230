"""The meet of request, grant and ceiling, and its explanation."""
