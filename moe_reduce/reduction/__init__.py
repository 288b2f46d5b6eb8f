"""Model -> smaller model: pure functions of (config, params)."""
