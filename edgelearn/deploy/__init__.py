"""What a real fleet needs besides the code: certificates, keys, the Flower app, a compose file.

`keys` makes certificates and node keys; `bundle` the Flower app that `flwr run` sends; `commands`
the command lines of SuperLink and SuperNodes; `compose` a docker-compose file of them; `register`
tells a SuperLink the devices' keys; `deployment` puts all of it into one folder. `export` writes a
finished run's model as a file for devices. Nothing here is imported by a run.
"""
