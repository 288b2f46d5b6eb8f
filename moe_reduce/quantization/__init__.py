"""Model -> the same model in fewer bits: pure functions of (config, params)."""
