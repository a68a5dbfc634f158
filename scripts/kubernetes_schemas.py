"""Extract the schemas of Kubernetes for kubeconform from the package kubernetes-validate.

    python -m scripts.kubernetes_schemas WHEEL FOLDER VERSION...

The schemas refer to each other by URLs. kubeconform reads files, so the references become relative.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path


def main(wheel: str, folder: str, *versions: str) -> None:
    """Write the schemas of each version into a folder of its name."""
    with zipfile.ZipFile(wheel) as package:
        for version in versions:
            inside = f"kubernetes_validate/kubernetes-json-schema/v{version}-local-strict/"
            names = [name for name in package.namelist() if name.startswith(inside)]
            if not names:
                sys.exit(f"{wheel} has no schemas of Kubernetes {version}")
            target = Path(folder, version)
            target.mkdir(parents=True)
            for name in names:
                schema = package.read(name).decode()
                relative = schema.replace('"/api/_definitions.json#', '"_definitions.json#').replace(
                    '"$id":', '"$comment":'
                )
                (target / name.removeprefix(inside)).write_text(relative)


if __name__ == "__main__":
    main(*sys.argv[1:])
