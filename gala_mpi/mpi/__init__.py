"""MPI as the rest uses it: windows that others write into, waits that end, agreement among ranks.

Imports the ground only; every package may import it. Entry point: `window.Window`.
"""
