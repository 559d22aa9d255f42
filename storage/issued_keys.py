"""API keys made over HTTP, kept in the database of the job records. The mirror in object storage does not hold them:
where that database is lost, so are they, and the keys of the settings remain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TypeAlias

from storage.errors import ApiKeyNotFound
from storage.key_rows import IssuedKey
from storage.records import Records

KeyList: TypeAlias = list[IssuedKey]


class IssuedKeys:
    """Part of `Jobs`. Each method is one transaction and safe to repeat.

    All raise RecordsError when the database fails.
    """

    _records: Records
    _clock: Callable[[], datetime]

    def add_key(self, key_id: str, tenant: str, name: str, key_sha256: str) -> IssuedKey:
        """The new key, or the one that was added under this id before."""
        key = IssuedKey(key_id, tenant, name, key_sha256, self._clock())
        with self._records.write("add_key") as tx:
            known = tx.keys.get(key_id)
            if known is None:
                tx.keys.insert(key)
        return known or key

    def issued_keys(self, *, valid_only: bool) -> KeyList:
        """Newest first; revoked ones too unless `valid_only`."""
        with self._records.read("issued_keys") as tx:
            return tx.keys.all(valid_only=valid_only)

    def revoke_key(self, key_id: str) -> IssuedKey:
        """Raises ApiKeyNotFound. A key that was revoked before stays as it was."""
        with self._records.write("revoke_key") as tx:
            known = tx.keys.get(key_id)
            if known is not None and known.revoked_at is None:
                tx.keys.revoke(key_id, self._clock())
                known = tx.keys.get(key_id)
        if known is None:
            raise ApiKeyNotFound(key_id)
        return known

    def note_key_uses(self, key_ids: Sequence[str]) -> None:
        """That these keys were used just now. Ids that are unknown are left out."""
        now = self._clock()
        with self._records.write("note_key_uses") as tx:
            for key_id in key_ids:
                tx.keys.note_use(key_id, now)
