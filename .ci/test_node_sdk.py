"""verify() against Layercode's own Node SDK, which needs Node.js: CI runs this, `pytest test_agent.py` does not."""

import asyncio
import json
import os
import time
from asyncio.subprocess import PIPE

import pytest

import agent

pytestmark = pytest.mark.asyncio
SECRET = "a webhook secret"


def signatures(body):
    """Headers of every shape, right and wrong."""
    now = int(time.time())
    right, v1 = agent.sign(body, SECRET, str(now)), agent.sign(body, SECRET, str(now)).partition("v1=")[2]
    for age in (-400, -302, -290, 0, 290, 302, 10**9):
        yield agent.sign(body, SECRET, str(now - age))
    yield from (right.upper(), right.replace(v1, v1.upper()), right + "0", right + "zz", right + ",v0=aa", "x" + right)
    yield from ("", "t=1", f"v1={v1},t={now}", f"t={now}, v1={v1}", f"t={now},v0={v1}", f"t={now},v0=a,v1={v1}")
    yield from (
        f"t={now}.0,v1={v1}",
        f"t=+{now},v1={v1}",
        f"t=0,{right}",
        f"t=1,v1=zz {right}",
        f"t={'9' * 5000},v1={v1}",
    )
    yield from (
        f"t={now};v1={v1}",
        f"T={now},v1={v1}",
        f"t={now},v1=",
        f"foot={now},v1={v1}",
        right[:-1],
        right + ";v1=0",
    )


@pytest.mark.skipif("LAYERCODE_NODE_SDK" not in os.environ, reason="LAYERCODE_NODE_SDK is not set to its index.js")
async def test_verify_agrees_with_layercodes_node_sdk():
    script = """import { verifySignature } from SDK; const [payload, secret, headers] = JSON.parse(process.argv[1]);
        console.log(JSON.stringify(headers.map(signature => verifySignature({ payload, signature, secret }))))"""
    script = script.replace("SDK", json.dumps(os.environ["LAYERCODE_NODE_SDK"]))
    headers = list(signatures(b'{"a": "b"}'))
    given = json.dumps(['{"a": "b"}', SECRET, headers])
    node = await asyncio.create_subprocess_exec("node", "--input-type=module", "-e", script, given, stdout=PIPE)
    assert json.loads((await node.communicate())[0]) == [
        agent.verify(header, b'{"a": "b"}', SECRET) for header in headers
    ]
