"""Configuration, parameter trees, errors, files and provenance: what every other room builds on."""
