"""Sweeps: what a command asks for, who works on the study, and the straight line from there to its conclusion."""
