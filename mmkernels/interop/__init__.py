"""Seams to other libraries, one file each.  Nothing here is imported by `import mmkernels`."""
