"""What runs in the middle. Flower looks for `app`."""

from edgelearn.federated.server_app import server_app

app = server_app()
