"""Kernels, imported as `semanticfl_ref.kernels`. Nothing is imported here: other libraries probe
for a package called `kernels` and may find this folder.
"""
