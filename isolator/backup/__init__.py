"""Backups: everything that a daemon keeps, as it was at one moment, and the way back.

Who reads what. ``isolator backup`` is root and has root's own files: settings, policies, the store, the images of
plugins' state. It opens nothing *in* them: an image is copied as bytes, frozen, so no link that a plugin made is ever
followed. The database is the host's: the host process itself writes a copy, of the turn of its event loop in which it
also writes ``backup.taken`` to the trail, and root reads that copy as bytes. What the trail has up to that record the
database has too; the trail is cut behind it. In folders of the host's and the audit user only plain files of
that user, with one name, are opened, and no link is followed. Without a daemon its lock is held and the files are
copied as they are.

- ``archive.py``: a backup on disk. A manifest with names, modes and SHA-256; numbered files; and the keys, sealed with
  AES-256-GCM under a passphrase (scrypt), which authenticates the manifest: whoever changes a byte is found out.
- ``freezer.py``: one plugin's state, its cage frozen meanwhile. A process of its own thaws it if this one is killed.
- ``take.py``: what is copied and in which order; DIR gets its name when everything is on disk.
- ``left_out.py``: what is not in it, told by whoever takes it.
- ``restore.py``: checks all of it while it is copied beside what is there, makes the users, changes owners.
- ``swap.py``: one file written is the decision; before it nothing counts, after it the renames are finished by whoever
  comes next, the daemon's start too. What was there before is kept in ``replaced-TIME``.
"""
