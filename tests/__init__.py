"""The test suite; helpers shared by several folders of it lie in ``tests.support``."""
