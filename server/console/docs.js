// Shows /openapi.json as a page, without anything from elsewhere.
const api = await (await fetch('/openapi.json')).json();
const named = (part) => (part?.$ref ? api.components.schemas[part.$ref.split('/').pop()] : part) ?? {};

function type(part) {
  if (!part) return '';
  if (part.$ref) return part.$ref.split('/').pop();
  if (part.anyOf) return part.anyOf.map(type).join(' or ');
  if (part.enum || part.const) return [].concat(part.enum ?? part.const).map((one) => JSON.stringify(one)).join(' | ');
  if (part.type === 'array') return `list of ${type(part.items) || 'anything'}`;
  if (part.additionalProperties) return `object of ${type(part.additionalProperties)}`;
  return part.type ?? 'anything';
}

function add(parent, tag, text = '') {
  const made = parent.appendChild(document.createElement(tag));
  made.textContent = text;
  return made;
}

function fields(parent, title, schema) {
  const found = named(schema);
  if (!found.properties) return;
  add(parent, 'h3', title + (schema.$ref ? `: ${type(schema)}` : ''));
  const table = add(parent, 'table');
  for (const [name, part] of Object.entries(found.properties)) {
    const row = add(table, 'tr');
    add(row, 'th', name + (found.required?.includes(name) ? ' *' : ''));
    add(row, 'td', type(part));
    add(row, 'td', part.description ?? '');
  }
}

function operation(parent, path, method, what) {
  const section = add(parent, 'details');
  add(section, 'summary', `${method.toUpperCase()} ${path}: ${what.summary ?? ''}`);
  add(section, 'p', what.description ?? '');
  const parameters = what.parameters?.map((one) => `${one.name} (${one.in})`).join(', ');
  if (parameters) add(section, 'p', `Parameters: ${parameters}`);
  for (const [media, body] of Object.entries(what.requestBody?.content ?? {})) fields(section, `Body, ${media}`, body.schema);
  const good = Object.entries(what.responses).find(([status]) => status.startsWith('2'));
  fields(section, `Reply ${good?.[0]}`, good?.[1].content?.['application/json']?.schema ?? {});
  const bad = Object.entries(what.responses).filter(([status]) => status >= '400');
  add(section, 'p', `Errors: ${bad.map(([status, one]) => `${status} ${one.description}`).join('; ')}.`);
}

const main = document.getElementById('operations');
for (const [path, methods] of Object.entries(api.paths)) {
  for (const [method, what] of Object.entries(methods)) operation(main, path, method, what);
}
const types = add(main, 'section');
add(types, 'h2', 'Types');
for (const name of Object.keys(api.components.schemas)) fields(types, '', { $ref: `#/components/schemas/${name}` });
document.getElementById('about').textContent =
  `Espalier ${api.info.version}. For programs: /openapi.json. With keys, send "Authorization: Bearer <key>".`;
