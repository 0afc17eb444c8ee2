"""Clients that nobody here wrote, against a running server: ``make client-test``.

Each ``check_*.py`` runs in an environment of its own, with one client and pytest and without this package. Plain
``make test`` collects none of them.
"""
