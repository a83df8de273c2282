"""What runs on a device. Flower looks for `app`."""

from edgelearn.federated.client_app import client_app

app = client_app()
