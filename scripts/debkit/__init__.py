"""Building Debian packages: the libraries (site), the layout that debhelper packs (tree), the command line."""
