# Read by the scripts of launch/, not started: puts the values of site.env into the environment, but for those that it
# has already. SITE names another file than launch/site.env. Without the file the environment has to have them.
site=${SITE:-$(dirname "${BASH_SOURCE[0]}")/site.env}
if [ -n "${SITE:-}" ] && [ ! -f "$site" ]; then
    echo "error: SITE=$SITE: there is no such file" >&2
    exit 2
fi
if [ -f "$site" ]; then
    while IFS='=' read -r key value || [ -n "$key" ]; do
        [[ $key =~ ^[A-Z][A-Z0-9_]*$ ]] || continue # a comment or an empty line
        [ -v "$key" ] || export "$key=$value"
    done <"$site"
fi
[ -z "${VENV:-}" ] || export PATH="$VENV/bin:$PATH"
