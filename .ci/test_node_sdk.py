"""verify() against Layercode's own Node SDK.

It needs node, and in LAYERCODE_NODE_SDK the path of the SDK's dist/esm/index.js.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from asyncio.subprocess import PIPE

import pytest

from agent import sign, verify

pytestmark = pytest.mark.asyncio

SDK = os.environ.get("LAYERCODE_NODE_SDK", "")
SECRET = "a webhook secret"
BODY = '{"a": "b"}'
SCRIPT = """
    const { verifySignature } = await import(process.argv[1]);
    const [payload, secret, signatures] = JSON.parse(process.argv[2]);
    const verdicts = signatures.map(
        (signature) => verifySignature({ payload, signature, secret }),
    );
    console.log(JSON.stringify(verdicts));
"""


NOW = str(int(time.time()))
RIGHT = sign(BODY.encode(), SECRET, NOW)
V1 = RIGHT.partition("v1=")[2]


def aged(seconds: int) -> str:
    """A signature that was made so long ago."""
    return sign(BODY.encode(), SECRET, str(int(NOW) - seconds))


# What Layercode could send, and what somebody could who does not know the secret.
ALIKE = [
    *[aged(seconds) for seconds in (-400, -310, -290, 0, 290, 310, 10**9)],
    sign(b'{"a":"b"}', SECRET, NOW),
    sign(BODY.encode(), "another secret", NOW),
    RIGHT,
    RIGHT.upper(),
    RIGHT.replace(V1, V1.upper()),
    RIGHT + "0",
    RIGHT + ",v0=aa",
    RIGHT[:-1],
    "",
    "t=1",
    f"t={NOW}, v1={V1}",
    f"t={NOW},v0={V1}",
    f"t={NOW}.0,v1={V1}",
    f"t=+{NOW},v1={V1}",
    f"t={'9' * 5000},v1={V1}",
    f"t={NOW};v1={V1}",
    f"T={NOW},v1={V1}",
    f"t={NOW},v1=",
]
# A secret that is being rotated, a newer scheme, another order.
ONLY_WE_ACCEPT = [
    f"t={NOW},v1=00,v1={V1}",
    f"t={NOW},v0=a,v1={V1}",
    f"v1={V1},t={NOW}",
]
# It looks for the signature anywhere in the header.
ONLY_THE_SDK_ACCEPTS = ["x" + RIGHT, RIGHT + "zz", RIGHT + ";v1=0"]


@pytest.mark.skipif(not (SDK and shutil.which("node")), reason=str(__doc__))
async def test_verify_agrees_with_layercodes_node_sdk() -> None:
    given = [*ALIKE, *ONLY_WE_ACCEPT, *ONLY_THE_SDK_ACCEPTS]
    node = await asyncio.create_subprocess_exec(
        *("node", "--input-type=module", "-e", SCRIPT),
        *(SDK, json.dumps([BODY, SECRET, given])),
        stdout=PIPE,
    )
    out, _ = await node.communicate()
    theirs = dict(zip(given, json.loads(out), strict=True))
    ours = {one: verify(one, BODY.encode(), SECRET) for one in given}
    assert ours[RIGHT]
    assert [one for one in given if ours[one] and not theirs[one]] == ONLY_WE_ACCEPT
    assert [one for one in given if theirs[one] and not ours[one]] == (
        ONLY_THE_SDK_ACCEPTS
    )
