// Shows the OpenAPI document with Swagger UI. URLs are relative to the page, which a proxy may publish under a prefix.

SwaggerUIBundle({
  url: new URL("./openapi.json", location).pathname,
  dom_id: "#swagger-ui",
  deepLinking: true,
  presets: [SwaggerUIBundle.presets.apis],
  validatorUrl: null, // the public validator would be asked about this service
});
