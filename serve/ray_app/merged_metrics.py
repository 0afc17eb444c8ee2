"""Metrics of several replicas as one text: every sample says whose it is."""

from collections.abc import Mapping


def merge_metrics(texts: Mapping[str, str]) -> str:
    """Expositions in Prometheus' text format, by replica, as one: ``name{...}`` becomes ``name{replica="...",...}``.

    A family keeps together what all replicas have of it, as the format asks for. Source: "Exposition formats" of the
    Prometheus documentation, version 0.0.4.
    """
    headers: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for replica, text in texts.items():
        family = ""
        for line in text.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                family = line.split(" ", 3)[2]
                header = headers.setdefault(family, [])
                if not any(known.startswith(line[:7]) for known in header):
                    header.append(line)
            elif line and not line.startswith("#"):
                headers.setdefault(family, [])
                samples.setdefault(family, []).append(_labelled(line, replica))
    lines = [line for family in headers for line in (*headers[family], *samples.get(family, ()))]
    return "".join(f"{line}\n" for line in lines)


def _labelled(sample: str, replica: str) -> str:
    """``sample`` with the label; a replica's name needs no escaping."""
    name_end = min(end for end in (sample.find("{"), sample.find(" ")) if end >= 0)
    name, rest = sample[:name_end], sample[name_end:]
    if not rest.startswith("{"):
        return f'{name}{{replica="{replica}"}}{rest}'
    separator = "" if rest.startswith("{}") else ","
    return f'{name}{{replica="{replica}"{separator}{rest[1:]}'
