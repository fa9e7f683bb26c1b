"""The run folder: stages, files, locks, stores, metrics, and where its actors fit."""
