from __future__ import annotations

from storage.digests import Crc32


def test_a_crc32_of_pieces_is_that_of_the_whole_as_s3_writes_it() -> None:
    crc32 = Crc32()
    for piece in (b"1234", b"", memoryview(b"56789")):
        crc32.update(piece)

    # The check value of CRC-32/ISO-HDLC, cbf43926: https://reveng.sourceforge.io/crc-catalogue/17plus.htm
    assert crc32.base64() == "y/Q5Jg=="
