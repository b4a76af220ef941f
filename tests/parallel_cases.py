"""Three rounds that engines of every layout run, and what must be true of their masks.

plain      no masks
masked     requests name A, B, none or nothing in turn, and G is the global mask
changed    G comes while all requests run, and goes
"""

from engines import traced_rows
from mask_cases import assert_comes_and_goes, violations

from moescope.analysis import open_store

NUM_PROMPTS = 16
# The second replica has less to do: it takes part in the other's steps with dummy batches.
OF_REPLICAS = range(10), range(10, NUM_PROMPTS)


def mask_for(i):
    return (None, "A", "B", "none")[i % 4]


def make_rounds(folder, numbers, masks, tokens):
    """The `rounds` of a job (engine_process.py), each with a store in `folder` by its name.

    `numbers` are those of the job's prompts, `masks` {name: mask}, and `tokens` {round: new tokens
    of a request}, in the order in which the rounds are to run.
    """
    more = {
        "plain": {},
        "masked": {"masks": [masks["A"], masks["B"]], "global": masks["G"]},
        "changed": {"comes": masks["G"]},
    }
    rounds = []
    for name, count in tokens.items():
        requests = [
            {
                "wishes": {"example_id": f"{i}"}
                | ({"mask": mask_for(i)} if name == "masked" else {}),
                "sampling": {"max_tokens": count},
            }
            for i in numbers
        ]
        rounds.append({"store": str(folder / name), "requests": requests} | more[name])
    return rounds


def assert_masks_obeyed(folder, masks, first=0):
    """Every request obeyed its own mask and no other; the first traced layer is `first`."""
    rows = traced_rows(folder / "masked")
    for i in range(NUM_PROMPTS):
        for mask in masks.values():
            obeyed = violations(mask, rows[f"{i}"][1], first) == 0
            assert obeyed == (mask["name"] == (mask_for(i) or "G")), (i, mask["name"])
    said = open_store(folder / "masked").execute(
        "SELECT DISTINCT example_id, tokens.mask FROM tokens JOIN requests USING (request_id)"
    )
    assert dict(said.fetchall()) == {f"{i}": mask_for(i) or "G" for i in range(NUM_PROMPTS)}
    assert assert_comes_and_goes(folder / "changed", masks["G"], first) == NUM_PROMPTS
