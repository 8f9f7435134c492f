"""The ranks of these tests themselves."""

import gc


def test_what_the_fork_server_imported_is_frozen(ranks):
    """The server says nothing when an import fails: every rank would import for itself, and walk it all in each collection."""
    assert min(ranks(2).run(gc.get_freeze_count)) > 100_000
