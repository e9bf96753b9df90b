"""A whole result of a small run, as plain values that a test may change."""

from typing import Any


def run_values() -> dict[str, Any]:
    """Ten people who took part in two blocs, two who did not; three rounds."""
    return {
        "fedge": "0.1.0",
        "seed": 7,
        "model": {
            "name": "SmolLM2 <135M>",
            "sha256": "ab" * 32,
            "licence": "apache-2.0",
            "bytes": 112_707_840,
        },
        "data": {"name": "BYU chit-chat", "licence": "MIT"},
        "devices": 10,
        "bloc_devices": 5,
        "rounds": 3,
        "steps": 5,
        "opened_blocs": 6,
        "sat_out": 0,
        "loss": {
            "zero_shot": 4.6012,
            "took_part": 3.7523,
            "zero_shot_never_seen": 4.5534,
            "never_seen": 3.7145,
            "pooled_reference": 3.7356,
            "pooled_reference_never_seen": 3.7067,
        },
        "people": _people(),
        "round_log": _round_log(),
        "agent": {"peak_rss_mb": 262.0, "peak_anon_mb": 104.0, "idle_rss_mb": 43.0},
        "bytes": {
            "up_per_round": 184_604,
            "up_total_per_device": 1_689_112,
            "down_total_per_device": 121_400_000,
            "bundle": 114_400_000,
        },
        "seconds": {"prepare": 11.0, "quantize": 92.0, "train": 410.0, "evaluate": 171.0, "total": 690.0},
        "cpu_seconds": {"hub_agents_and_workers": 980.0},
        "broker": "mosquitto 2.0.11",
        "notes": ["two agents & one hub were started again"],
    }


def _people() -> list[dict[str, Any]]:
    return [
        {
            "id": f"user{place:04d}",
            "took_part": place < 10,
            "bloc": f"bloc-{place % 2}" if place < 10 else None,
            "before": 4.5 + place / 100,
            "after": 3.7 + place / 50,
            "labels": 300 + place,
        }
        for place in range(12)
    ]


def _round_log() -> list[dict[str, Any]]:
    return [
        {
            "bloc": bloc,
            "round": number,
            "seconds": 20.5 * number,
            "training_loss": 4.4 - number / 10,
            "mean_norm": 8.25,
            "sum_norm": 17.5,
            "bits": 16 if number == 1 else 8,
        }
        for bloc in ("bloc-0", "bloc-1")
        for number in (1, 2, 3)
    ]
