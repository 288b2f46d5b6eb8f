"""Model -> numbers and text."""
