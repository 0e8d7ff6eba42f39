"""Laplace-Beltrami spectra: discretise, solve, differentiate, perturb.

To add a discretisation, write a function that returns an :class:`Operator`; everything below
it works from the two matrices alone.
"""
