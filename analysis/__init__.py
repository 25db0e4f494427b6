"""Questions asked of finished runs. Reads records only: never torch, trl or optuna."""
