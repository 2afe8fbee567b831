"""weightsyncd: the service that runs on each node. Start it with `weightsyncd --node-config node.toml`.

server      bytes of trainers, operators and other daemons → pushes
push        one push: events to its session, instructions to whoever carries them out
executor    instructions → this node's engines and bridges
peers       instructions → other nodes
engines     this node's engines and what is known of them
bridges     this node's bridge processes
health      status, metrics, /healthz
"""
