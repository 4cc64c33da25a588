"""Is this training what it should be? :func:`~lit_basics.verification.checks.verify` tries it.

``checks`` makes the ``runs`` that it needs, each a process of its own (``forks``), traced step by step
(``tracing``), and puts what it found into a ``report``; ``plain_loop`` and ``ranks`` are what runs are compared
with.
"""
